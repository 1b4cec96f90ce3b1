"""Step 2: other conversation formats to ShareGPT.

sources   records out of JSON, JSON Lines, Parquet, CSV and TSV files, one at a time
formats   what shape a record has, and its turns
convert   the request, its report and the writer
"""
