// Memory of the core and a record of every cycle. One flat memory; addresses wrap at its size,
// except the command port (bit 30), whose stores can be held.
#include "Vcore_top.h"
#include "verilated.h"
#include <cstdint>

struct Cycle { uint32_t launch, pc, valid, instr, addr, wdata, wstrb, ready, trap, la_write; };

extern "C" int run(uint32_t* mem, int words, const int* hold, int holds, Cycle* log, int cycles) {
  VerilatedContext ctx; Vcore_top t{&ctx};
  t.clk = 0; t.resetn = 0; t.mem_ready = 0; t.mem_rdata = 0; t.eval();
  for (int i = 0; i < 4; i++) { t.clk = 1; t.eval(); t.clk = 0; t.eval(); }
  t.resetn = 1;
  int held = 0, stores = 0;
  for (int c = 0; c < cycles; c++) {
    bool port = t.mem_valid && t.mem_wstrb && (t.mem_addr >> 30 & 1);
    int want = port && stores < holds ? hold[stores] : 0;
    t.mem_ready = t.mem_valid && held >= want;
    t.eval();
    log[c] = {t.launch, t.pc, t.mem_valid, t.mem_instr, t.mem_addr, t.mem_wdata, t.mem_wstrb,
              t.mem_ready, t.trap, t.mem_la_write};
    uint32_t la = t.mem_la_addr, read = t.mem_la_read;
    if (port) { if (t.mem_ready) { stores++; held = 0; } else held++; }
    else if (t.mem_ready && t.mem_wstrb) {
      uint32_t mask = 0;
      for (int b = 0; b < 4; b++) if (t.mem_wstrb >> b & 1) mask |= 0xffu << 8 * b;
      uint32_t& word = mem[(t.mem_addr >> 2) % words];
      word = (word & ~mask) | (t.mem_wdata & mask);
    }
    if (t.trap) return c + 1;
    t.clk = 1; t.eval(); t.clk = 0;
    if (read) t.mem_rdata = mem[(la >> 2) % words];
    t.eval();
  }
  return cycles;
}
