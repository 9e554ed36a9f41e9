"""A quantised GGUF file's weights as float32 or bfloat16, for llama.cpp: the same numbers that the others compute with.

python benchmarks/peers/to_gguf.py SOURCE.gguf DESTINATION.gguf float32
"""

from __future__ import annotations

import sys

import gguf
from gguf.quants import dequantize, quantize

TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def main() -> None:
    """Vectors stay float32, as llama.cpp wants them."""
    source, destination, dtype = sys.argv[1:4]
    tensor_type, file_type = TYPES[dtype]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(destination, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        data = dequantize(tensor.data, tensor.tensor_type)
        kept = gguf.GGMLQuantizationType.F32 if data.ndim == 1 else tensor_type
        writer.add_tensor(tensor.name, quantize(data, kept), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
