"""``fastvae tune``: the fastest form of each convolution on a device, among those that keep the network accurate.

layers    the layers of a model, each at the sizes of its images
measure   a layer's error and time in every form
network   the error of the whole network, by the derived tolerance
journal   what was measured so far, kept through a kill
tune      the run: measure, choose, check, write the table
"""
