"""The folder of latents: what is planned, what is committed, and checks of both.

errors          StoreError, StoreLocked, IdentityMismatch
layout          names of files and folders, and checks of the files with those names
identity        digest of the model, numerics and preprocessing that made the latents
store_json      store.json: reading and checking it
plan            units and plan files
lock            one process at a time in a folder
leases          which process works on which unit
shard           bytes of a shard, a safetensors file
commits         commit records, written last
store           Store: open, plan, commit, index
mapped_shard    a shard mapped into memory
shard_metadata  the metadata in a shard's header against store.json
scaling         raw or scaled moments of a store
verify          checks of every committed shard, by hash and row by row
info            facts of a store, for `fastvae info`
"""
