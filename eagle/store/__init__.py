"""The store: features on disk, written by data generation, read by training.

record          one conversation's features
shard           one file of records, with a checksum for each: the format
writer          records to the numbered shards of a folder
dtypes          how a feature is stored: as computed, or in one byte a channel
damage          what is wrong with files, and what with the machine that reads them
open_files      which files of a store are mapped
manifest        what made a store
reader          every record below a folder, whoever wrote it
classic_dumps   the ``data_<n>.ckpt`` pickles of the public scripts
verify          every checksum and count of a store
reshard         the same records in other folders, whole shards at a time
resharded       what these are made of, and whether they were made before
replacing       and how these take the old ones' place
"""
