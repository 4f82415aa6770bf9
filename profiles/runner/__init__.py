"""The program that runs on a device: it opens exported models in their runtime and reads the clock.

Self-contained (standard library, numpy and the runtime itself), so that this folder can be sent to a
machine that has nothing else of the project: nothing in here imports anything outside. Started with
`python -m profiles.runner`, it talks JSON lines, one request on stdin, one answer on stdout, in turn (see
`requests.py`). The runner imports the runtime once but never opens a model: every measured process is a
fresh fork of it, which starts in milliseconds and dies with it.

It knows nothing of devices, layers, statistics or files other than the model it is told to open; whoever
asks decides how often to measure and what the numbers mean.
"""
