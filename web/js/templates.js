// The list of templates shows our workflows in the order of their numbers.
//
// The server lists files as the file system does, which is no order on Linux.
import { api } from "../../../scripts/api.js";

const OURS = /^GMFlow \d\d - /;
const listed = api.getWorkflowTemplates?.bind(api);

if (listed) {
  api.getWorkflowTemplates = async () => {
    const byPack = await listed();
    for (const names of Object.values(byPack ?? {})) {
      if (Array.isArray(names) && names.some((name) => OURS.test(name))) names.sort();
    }
    return byPack;
  };
}
