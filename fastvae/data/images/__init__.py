"""Bytes of one image file to upright 8-bit sRGB pixels, scaled and cropped to a bucket.

errors       ImageError and its reasons
formats      detection of formats and of truncated files
jpeg         kinds of JPEG that are refused, and profiles in chunks
png          chunks of PNG: text and profiles that are left out
tiff         directories of TIFF: planes, and raw files of cameras
colour       ICC profiles, CMYK, palettes, 16 bits and transparency to sRGB
colour_tags  colour information that is not applied, counted
read         read_image and image_size: pixels or size of one file
buckets      tables of sizes, and the bucket of an image
size_rules   images that are left out for their size
crop         resize, mirror and crop to a bucket
"""
