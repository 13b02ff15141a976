// picorv32 as the contract wants it, with the few signals that the measurement looks at.
// Memories are in the C++ bench: they answer in the cycle after the look-ahead address, so
// mem_ready is high in the first cycle of mem_valid unless the bench holds a store.
module core_top (
  input clk, input resetn, input mem_ready, input [31:0] mem_rdata,
  output mem_valid, output mem_instr, output [31:0] mem_addr, output [31:0] mem_wdata,
  output [3:0] mem_wstrb,
  output mem_la_read, output mem_la_write, output [31:0] mem_la_addr,
  output launch, output [31:0] pc, output trap
);
  picorv32 #(
    .ENABLE_COUNTERS(0), .ENABLE_COUNTERS64(0), .ENABLE_REGS_DUALPORT(1), .BARREL_SHIFTER(1),
    .ENABLE_FAST_MUL(1), .ENABLE_DIV(1), .CATCH_MISALIGN(1), .CATCH_ILLINSN(1),
    .REGS_INIT_ZERO(1), .STACKADDR(32'h1000_1000)
  ) cpu (
    .clk(clk), .resetn(resetn), .trap(trap),
    .mem_valid(mem_valid), .mem_instr(mem_instr), .mem_ready(mem_ready), .mem_addr(mem_addr),
    .mem_wdata(mem_wdata), .mem_wstrb(mem_wstrb), .mem_rdata(mem_rdata),
    .mem_la_read(mem_la_read), .mem_la_write(mem_la_write), .mem_la_addr(mem_la_addr),
    .pcpi_wr(1'b0), .pcpi_rd(32'b0), .pcpi_wait(1'b0), .pcpi_ready(1'b0), .irq(32'b0)
  );
  assign launch = cpu.launch_next_insn;   // first cycle of an instruction
  assign pc = cpu.next_pc;                // its address in that cycle
endmodule
