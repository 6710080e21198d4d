"""Forms of 3x3 convolutions beside each other, in turns, each after a gate of accuracy (bench/device.sh).

layers                  one layer with the passes before and behind it, in each form, and the pieces of Winograd's
test_upsample           the upsampling convolutions of Stable Diffusion
test_winograd           the layers of Stable Diffusion
test_winograd_networks  its encoder and decoder
"""
