"""Images by key, from any kind of source, in an order that does not depend on the file system.

storage     files on the local disk or on an fsspec file system
patterns    brace and glob expansion, as text
source      the Source protocol, and how keys are made unique
folder      images in a folder, or matching a pattern
remote      images under a URL
tar         images in WebDataset tars
parquet     images in a column of Parquet files
jsonl       images named by JSONL manifests
several     images of several folders, patterns and URLs
captions    captions beside the images of a folder
companions  masks and control images, found by name
changes     a source against a plan: keys of other origins, edited and deleted images
open        open_source: the kind of source that an argument names
"""
