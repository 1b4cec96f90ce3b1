"""The draft families: everything that a draft is, for training, decoding and export alike.

families        the table: a family by name, and which one a saved draft is of
interface       what a family has to answer, as the stages ask for it
network         what every draft network can be asked to do; layers: the parts they are built from
alignment       the one shift: what a draft reads and is trained on at every position
unroll          several draft steps at once, for every position in parallel
objective       losses and agreements as the training loop sees them
losses          pure functions; token_loss: them through a frozen head, block by block
starts          what a draft may start from
memory          what a draft takes while it is trained, from shapes alone
vllm_layout     a folder that one generation of vLLM loads
saved           a draft on disk
eagle1/         the first family
"""
