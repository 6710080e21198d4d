"""The fast path: one forward for encoder and decoder over any module tree of this shape, fastvae's or diffusers'.

accelerate        accelerate, accelerated, restore, refresh, fast_report
fast_path         the state that an accelerated VAE carries
copying           copies and pickles of an accelerated part
capture           CUDA graphs and torch.compile of whole passes
survey            what runs fused, kept until anything that decides it changes
network_walk      the order of the blocks of encoder and decoder
layer_checks      properties of a single layer
fallback_reasons  why a module falls back, one named reason each
inference_pass    blocks without a gradient, on fused kernels
training_pass     blocks with a gradient, on fused kernels
cpu               blocks without fused kernels on a CPU: the pass, GroupNorm, attention
tiled             exact tiling: encode and decode in bands of rows within a memory budget
packed_weights    laid-out copies and products of weights
forms             the form of each convolution, by tables of measurements
fp32_copy         the copy on which rows that overflow are computed again
counters          counts kept on the device
calibration       calibrate: power-of-two factors for half precision
cost_trace        launches, bytes and operations of a pass, on fake tensors
explain           explain: the path and the reason for each block
"""
