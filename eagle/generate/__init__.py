"""Step 3: conversations to features.

main        the command line of ``allocation.py``
job         the request resolved once, and the manifest that every worker reads its share from
plan        what the job will need: disk, commands, time (``--dry_run``)
launch      one worker process per card group, watched to its end
worker      tokens to features, in batches of similar length
sources     what computes features
collector   features to shards, in other threads than the one that computes
progress    what workers report
"""
