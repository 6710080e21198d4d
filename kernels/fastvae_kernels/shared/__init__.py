"""Device code and launch helpers that every op may use.

ops         registration of ops with torch's dispatcher
runtime     where kernels run, and the Cost of a call
tiles       the tile of a kernel, from the tables in tuned/
statistics  partial statistics, and merging them
philox      counter-based random numbers
winograd_matrices  coefficients of Winograd's convolutions, for GPUs and CPUs
"""
