"""Conversations in, the same prompts with the target's own replies out, turn after turn.

request        the options, checked
conversations  which conversations of a data file are asked
dialogue       a record -> what is asked of the target; its replies -> the rows that are trained, and the record
journal        every reply on disk as it comes: what a killed run goes on from
address        one server: how it is written, reached and called
transport      requests to OpenAI-compatible servers: several, retried, waited for
served         replies from such servers; what any engine is asked with
probing        whether a server renders and tokenises prompts as the target's folder says
engine_args    which flags of a vLLM that is started here decide replies, and which may not be there
own_server     a vLLM started here for the time of the job
own            replies decoded here, by transformers, in batches
asking         all conversations at once, in threads
report         what became of them, in words
job            the whole: what is there already, which engine, the output
main           the command line of ``tools/regenerate.py``
"""
