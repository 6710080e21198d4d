"""The form of each 3x3 convolution: direct, or Winograd's, by tables (on a GPU for frozen weights alone).

form         Form, LayerKey, Entry, and Forms: the entries of one device
device_name  the name of a card, or of a CPU's class, that a table has
shapes       the convolutions of a part, with their sizes for an input
tables       shipped/<device>.json and the user's own, which ``fastvae tune`` writes
"""
