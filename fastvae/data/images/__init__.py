"""Bytes of one image file to upright 8-bit sRGB pixels, scaled and cropped to a bucket.

errors   ImageError and its fixed list of reasons
formats  the format by its first bytes, and whether the end is missing
colour   profiles, CMYK, palettes, 16 bits and transparency to sRGB
read     read_image and image_size: the rules for one file
buckets  tables of sizes, and the bucket an image goes to
crop     mirror, resize and crop to the bucket
"""
