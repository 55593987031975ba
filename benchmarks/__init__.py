"""Side-by-side measurements against other people's code, and how cost grows with size.

    python -m benchmarks                       # all CPU measurements, about ten minutes
    python -m benchmarks training decoding     # some of them: training, decoding, reward, cost
    python -m benchmarks decoding --llama2c ./run      # also beside llama2.c's program (needs LLAMA2_REAL_DATA)
    python -m benchmarks.gpu                   # one GPU: training MFU, decoding bandwidth, a PPO iteration

Competitors take turns within one process, so that a busy machine disturbs both; what counts is the ratio of
neighbouring turns. The table goes to the screen, everything to results/<hardware>/. No test asserts a time.
"""
