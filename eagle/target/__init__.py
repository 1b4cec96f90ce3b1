"""The frozen target (base) model.

config         config.json of any generation -> one dataclass
families       the supported model types: config keys, tensor names, template, what is refused
weights        its tensors in any file layout: what headers say, one at a time, some bytes
trunk          the model without its ``lm_head``, which computes features; the tensors it has to have
identity       the fingerprint that stores and checkpoints name
check          all of it asked at once, before anything is claimed
tokenizer      its tokenizer, whose tokens must have rows in the embedding
packing        sequences in one row, what they begin with alike once
cpu_trunk, cpu_attention    the forward pass on a CPU, faster
compiled       the same through torch.compile
"""
