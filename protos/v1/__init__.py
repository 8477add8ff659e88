"""The contract: protobuf sources and the code generated from them, side by side. Imports nothing of ours."""
