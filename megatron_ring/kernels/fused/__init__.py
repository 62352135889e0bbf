"""Operations beside attention that several libraries have fused: one signature each, and who computes it in a run."""
