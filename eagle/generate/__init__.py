"""Step 3: conversations to features.

main        the command line of ``allocation.py``
request     what was asked for
job         the request resolved once, and the manifest that every worker reads its share from
plan        what the job will need: disk, commands, time (``--dry_run``)
claim       the folder of a job while it runs
dealing     who computes what, from the start or of what is left
launch      one worker process per card group, watched to its end
worker      tokens to features, in batches of similar length
sources     what computes features
engine_process   an engine beside a training process, asked for features; engine_server: that engine
fetch       features from a card into host memory while it goes on
collector   features to shards, in other threads than the one that computes
progress    what workers report
"""
