"""Images in, latents stored, and read again for training. Sub-packages, in the order that data meets them;
each imports only what is listed above it.

rows       names of rows: source files, sample ids, noise keys, bucket sizes
images     bytes of one image to upright sRGB pixels of a bucket
sources    where images come from: folders, patterns, tars, Parquet, JSONL, URLs
store      the folder of latents: plan, leases, shards, commit records, verify
datasets   torch datasets and loaders over a store, or encoding in the training loop
encoding   `fastvae encode` and `fastvae repair`: a source to a store
exporting  `fastvae export`: a store to other trainers' layouts
decoding   `fastvae decode` and `fastvae demo`: latents back to images
"""
