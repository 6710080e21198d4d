"""Whole passes captured once and run again: as CUDA graphs, or by torch.compile.

cuda_graphs      CUDA graphs of whole passes
compiled_passes  torch.compile of a whole pass
"""
