"""Blocks without fused kernels on a CPU, without a gradient.

attention   self-attention with queries in bands
cpu_pass    the pass, in channels_last: C kernels and oneDNN
group_norm  GroupNorm with SiLU: the C kernel, or torch's operators; of whole images and of bands
"""
