"""The form of each 3x3 convolution of a frozen model: direct, or Winograd's, by tables of measurements.

form         Form, Layer, Entry, and Forms: the entries of one device
device_name  the name of a card, or of a CPU's class, that a table has
shapes       the convolutions of a part, with their sizes for an input
tables       shipped/<device>.json and the user's own, which ``fastvae tune`` writes
"""
