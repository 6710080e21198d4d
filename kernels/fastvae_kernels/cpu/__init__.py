"""Kernels for a CPU in C, built with the package on Linux where a C compiler is, called through ctypes.

sources     names, flags and hash of the C files, for setup.py and for library
library     the library: loaded once, or the reason why there is none
group_norm  GroupNorm with SiLU, of whole images and of bands of rows
winograd    3x3 convolutions by Winograd's algorithm, of whole images and of bands of rows
"""
