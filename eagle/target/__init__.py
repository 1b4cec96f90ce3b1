"""The frozen target (base) model.

config         config.json of any generation -> one dataclass
families       the supported model types: config keys, tensor names, template, what is refused
weights        its tensors in any file layout, one at a time; the fingerprint
trunk          the model without its ``lm_head``, which computes features
cpu_attention, compiled    the same faster, on a CPU and through torch.compile
"""
