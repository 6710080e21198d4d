"""Rates of the store, and whole runs over photographs.

read_rate      rows a second from a warm page cache
mixed_formats  photographs in every format and form that is taken
photo_run      encode, kill, resume, verify, decode, train
"""
