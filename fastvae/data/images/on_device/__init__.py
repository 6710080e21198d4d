"""Decoded pictures on their way to a device that resizes them.

picture_buffer  memory of pictures that wait to be copied, bounded in bytes
resize          batches of a bucket from such pictures, by the op resize_lanczos
"""
