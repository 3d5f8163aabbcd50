"""From quantized models to ONNX: what each op and each fake-quantizer becomes there."""
