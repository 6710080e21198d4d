"""Blocks without fused kernels on a CPU, without a gradient.

cpu_pass    the pass, in channels_last: C kernels and oneDNN
group_norm  GroupNorm with SiLU: the C kernel, or torch's operators
"""
