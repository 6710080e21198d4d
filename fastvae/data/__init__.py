"""Images in, latents stored, and read again for training. Sub-packages, each importing only what is listed below it:

exporting  `fastvae export`: a store to other trainers' layouts
decoding   `fastvae decode` and `fastvae demo`: latents back to images
encoding   `fastvae encode` and `fastvae repair`: a source to a store
datasets   torch datasets and loaders over a store, or encoding in the training loop
store      the folder of latents: plan, leases, shards, commit records, verify
sources    where images come from: folders, patterns, tars, Parquet, JSONL, URLs
images     bytes of one image to upright sRGB pixels of a bucket
rows       names of rows: source files, sample ids, noise keys, bucket sizes
"""
