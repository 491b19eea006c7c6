"""The worker process: it owns packets and nothing else.

A worker gets descriptors, keys and numbers from the main process. It reads no configuration, resolves no names,
opens no files and decides about nobody.
"""
