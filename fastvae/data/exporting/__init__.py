"""A store's rows in the layouts that other trainers read.

export      fastvae.export
writer      what every layout shares
kohya       npz caches of kohya's sd-scripts
webdataset  tars of WebDataset
parquet     Parquet files, and a dataset card for the Hub
"""
