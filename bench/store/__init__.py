"""Rates of the store, and whole runs over photographs.

read_rate      rows a second from a warm page cache
mixed_formats  writes photographs in every supported format, for photo_run
photo_run      encode, kill, resume, verify, decode, train
"""
