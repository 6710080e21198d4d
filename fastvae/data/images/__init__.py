"""Bytes of one image file to upright 8-bit sRGB pixels, scaled and cropped to a bucket.

errors       ImageError and its reasons
head         size, orientation and metadata of a file, by the parsers below, without a decoder
formats      detection of formats and of truncated files; headers of GIF and BMP
jpeg         headers of JPEG, and kinds of JPEG that are refused
png          headers and damaged chunks of PNG
tiff         directories of TIFF: headers, planes, and raw files of cameras
webp         headers of WebP
avif         headers of AVIF
decoder      Pillow's decoders
colour       ICC profiles, CMYK, palettes, 16 bits and transparency to sRGB
colour_tags  colour information that is not applied, counted
read         read_image and image_size: pixels or size of one file
buckets      tables of sizes, and the bucket of an image
size_rules   images that are left out for their size
crop         resize, mirror and crop to a bucket
on_device    images that a device scales and crops, in memory that it reads
"""
