import gc

# What is imported stays, so nothing has to look through it for garbage: see Worker._start.
gc.disable()

from bulkvpnd.dataplane.worker import main  # noqa: E402

main()
