"""A source of images to a store: `fastvae encode` and `fastvae repair`.

encode        fastvae.encode
repair        fastvae.repair
model         opening a model, checking that a store can hold its latents, its identity
settings      settings of a run, resolved, and the identity they make
image_reader  source and preprocessing policies, applied to one file
planning      which files need a row, and in which bucket
batch_size    batch size and threads, from memory
self_check    the fast path against torch on one image, before a run
run           a run from its plan to its report
worker        units claimed, encoded, committed; units of dead processes taken over
pipeline      decode, encode and collect at the same time, in order
encoder       pixels to moments: dtype, retry in fp32, copies from the GPU
row_format    moments to stored tensors
salvage       intact rows of a damaged shard
report        EncodeReport, and its JSON
"""
