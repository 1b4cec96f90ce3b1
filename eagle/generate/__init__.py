"""Step 3: conversations to features.

job         the request resolved once, and the manifest that every worker reads its share from
tokens      the conversations as tokens, shared by the workers
plan        what the job will need: disk, commands, time (``--dry_run``)
launch      one worker process per card group, watched to its end
worker      tokens to features, in batches of similar length
compiled    the trunk through torch.compile, checked before it is used
collector   features to shards, written behind the worker's back
progress    what workers report
"""
