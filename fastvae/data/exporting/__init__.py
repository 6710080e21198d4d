"""Export of a store's rows to the layouts of other trainers.

export      fastvae.export
writer      base class of the layouts
kohya       npz caches of kohya's sd-scripts
webdataset  tars of WebDataset
parquet     Parquet files, and a dataset card for the Hub
"""
