"""Step 5: a folder that stock vLLM loads, and the proof that it does.

convert        the command line
export         a saved draft -> folders
self_check     what an export must be, rule by rule, on the files as they lie on disk
serving        what vLLM has to be told beside the draft, and which targets it cannot serve
note           the folder's README: how to serve it
engine         one vLLM engine in a process of its own
verify         the draft proven in it
"""
