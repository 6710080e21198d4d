"""Work on the kernels' sources: compile audit, mutations, tiles.

launches  every launch, recorded on fake tensors and compiled
audit     every kernel at every tile, compiled for every target
mutate    small wrong changes, each of which must make a test fail
tune      the search of tiles on this GPU
"""
