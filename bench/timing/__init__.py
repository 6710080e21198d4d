"""Times, beside eager torch and diffusers, each after a gate of accuracy.

cases          the table of what is timed
operations     inputs, ours, plain torch and the truth of each op
gate           the derived tolerance, and inputs larger than the L2 cache
stopwatch      seconds of one call, contestants in turns
environment    commit, sources, versions and device of a result
contestants    the contestants of an encoder or decoder
networks       one encoder or decoder case
profiles       where a pass spends its time
roofline       the floor of the whole network, counted
regressions    this tree beside another commit
conftest       options and the results file of the tests here
test_ops       each op
test_networks  the encoder and the decoder
test_profile   profiles of both
test_loader    LatentLoader
feed           a folder of photographs to a store, with an encoder that waits
forms          Winograd's forms beside the direct one
pictures       pictures on their way to the encoder
test_pipeline  a folder of photographs to latents on disk
"""
