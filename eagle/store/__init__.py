"""The store of features on disk; `eagle.store.reader` reads it.

shard           one file of records, memory-mapped, with a checksum for each
store_dtype     how a feature is stored: as computed, or in one byte a channel
verify_store    every checksum and count of a store
classic_dumps   the ``data_<n>.ckpt`` pickles of the public scripts
reshard         the same records in other folders, whole extents at a time
"""
