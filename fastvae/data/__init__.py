"""Images in, latents stored, and read again for training.

Where images come from: sources, patterns, remote_source, tar_source, table_source, manifest_source; file_systems.
What pixels they give: images, colour, jpeg, signatures, reasons; buckets, preprocess, reading.
A run: encode, repair, kept, job, settings, accepted, identity, devices, self_check; plan, batches, pipeline,
moment_encoder, storing, threads; run, report, console.
What lies on disk: store, records, worklist, shards, stated, json_text; leases, lock, places, disk; facts,
verify.
What training reads: dataset, iterable, sampler, collate; order, noise, normals, space, mapped_shards, buffers; loader,
transfer.
And back to pictures: decode, demonstration.
For other trainers: export, export_formats.
"""
