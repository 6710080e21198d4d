"""Parts of ops that are too long for one file, or that ops share; no ops themselves.

group_norm_tiles     tiles and channel vectors of GroupNorm's composite and its gradient
group_norm_gradient  dx, dweight, dbias of GroupNorm with SiLU
attention_tiles      tiles and launches that the attention kernels share
attention_products   attention as two products
attention_gradient   dq, dk, dv
moments              the layout of moments, and the clamp of log-variances
posterior_gradient   the gradient of sample_posterior
winograd_tiles       tiles, groups and strips of Winograd's convolution
winograd_input       the pass before its products
winograd_output      the pass behind them
lanczos              weights of Pillow's Lanczos resize
resize_tables        tables of a launch of resize_lanczos
"""
