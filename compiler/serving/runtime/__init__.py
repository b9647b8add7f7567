"""What the generate model of a Triton repository runs. Copied into it as it is: nothing here imports this project.

model             Triton's entry: requests in, text out
encoder_model     Triton's entry for an encoder: texts in, vectors or labels out
texts             texts as an encoder's inputs, and its answers as labels
scheduler         sequences that join and leave the running batch between steps
opening           a model file -> what runs it: onnx_engine, or tensorrt_engine with the driver's calls in cuda
saturation        does this CPU compute what the model was lowered for
text, sampling    tokens and chat templates; which token comes next
integrity         are the files what the compiler wrote, before any is loaded
digest, header    links to compiler/artifact/digest.py and compiler/backend/tensorrt/header.py: edit them there
"""
