"""Torch datasets and loaders over a store, and encoding inside the training loop.

dataset          LatentDataset: rows by number or key, from mapped shards
iterable         LatentIterable: one pass, a few shards at a time
image_dataset    ImageDataset: images of a folder as pixels; broken ones are skipped and counted
row_view         rows inside Subset and ConcatDataset, several stores as one dataset, packed keys
sampler          BucketBatchSampler: batches of one bucket, shuffled and split by rank
buffer_pool      reused memory of batches
collate          rows to a batch; SDXL's time ids
device_transfer  CUDA streams of LatentLoader
loader           LatentLoader: latents of the next batches while one trains
"""
