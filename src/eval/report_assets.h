// The report's files of src/eval/report/, put into the library by the build (cmake/assets.cpp.in).
#pragma once

namespace larosa {

extern const char* const kReportPage;     // page.html, with {{names}} of what goes where
extern const char* const kReportPageCss;  // page.css
extern const char* const kReportPlotCss;  // plot.css, also inside every standalone plot
extern const char* const kReportScript;   // page.js

}  // namespace larosa
