"""Step 4: features to a draft.

main            opens what is named, and trains
arguments       the command line of ``eagle.train.main``
options         what was asked for, checked once
launch_check    what a launcher made of it; accelerator: the devices and the precision that came of that
group           the processes of a run begin together or not at all
agreement       what they have to see alike
watch           and they end together: heartbeats and last words
exchange        sums and weights between them
dataset         records to examples: the split, the noise, the order
loader          batches from the store to the device, read ahead
whole_store     a store without what is damaged in it, found by one process for all
live_features   features computed as training goes, instead of a store; engine: by an engine beside the run
loop            accumulate, backward, clip, step, schedule, validate, save
schedule        the learning rate's course
averaging       an average of the weights, in the optimizer's state
sharding        FSDP
validation      how far the draft's chains would get, from stored features alone
divergence      a run that goes wrong is stopped
checkpoint      ``state_<step>/``, complete or absent
run_log         metrics.jsonl and the progress bar; picture: metrics.svg
dry_run         what a run takes of memory, printed; memory_plan: computed
"""
