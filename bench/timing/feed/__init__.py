"""Rates from a folder of photographs to a committed store, with an encoder that only waits.

photographs  JPEGs of three sizes, and their page cache
waiting      an encoder and a resize that take a device's time and none of the CPU's
plain        a torch DataLoader with the same encoder
test_feed    images a second and CPU milliseconds an image, cold and warm
"""
