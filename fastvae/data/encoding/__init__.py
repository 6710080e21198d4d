"""A source of images to a store: `fastvae encode` and `fastvae repair`.

encode        fastvae.encode
repair        fastvae.repair
model         opening a model, checking that a store can hold its latents, its identity
options       options of encode and repair: those that decide latents, and those of the run
settings      settings of a store, resolved with its model, and the identity they make
image_reader  source and preprocessing policies, applied to one file; decoding of a few rows, here or in a child
planning      which files need a row, and in which bucket
batch_size    batch size and threads, from memory
self_check    the fast path against torch on one image, before a run
run           a run from its plan to its report, for encode and repair
worker        one process: claims units, encodes, commits, takes over those of dead processes
pipeline      decode, encode and collect at the same time, in order
encoder       pixels to moments: dtype, retry in fp32, copies from the GPU
row_format    moments to stored tensors
salvage       intact rows of a damaged shard
report        EncodeReport, and its JSON
"""
