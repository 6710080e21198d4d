"""Times of pictures on their way to the encoder (bench/device.sh).

test_resize  resize_lanczos, from decoded pictures to the pixels of a bucket
"""
